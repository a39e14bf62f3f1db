select brightrun.engine_version()
