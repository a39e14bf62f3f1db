select brightrun.cancel($1, $2)
