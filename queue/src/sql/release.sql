select brightrun.release($1, $2, $3)
