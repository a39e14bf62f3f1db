select brightrun.pause($1, $2)
