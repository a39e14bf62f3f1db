select brightrun.complete($1, $2, $3)
