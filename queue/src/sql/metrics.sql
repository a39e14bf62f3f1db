select brightrun.metrics()
