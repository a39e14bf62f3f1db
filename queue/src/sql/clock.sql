select brightrun.now()
