select brightrun.set_limit($1, $2, $3, $4)
