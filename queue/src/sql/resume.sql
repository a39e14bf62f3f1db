select brightrun.resume($1)
