select brightrun.maintain()
