select brightrun.drop_schedule($1)
