select brightrun.report($1, $2, $3, $4)
