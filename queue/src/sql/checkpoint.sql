select brightrun.checkpoint($1, $2, $3)
