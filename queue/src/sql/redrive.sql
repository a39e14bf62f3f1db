select brightrun.redrive($1, $2)
