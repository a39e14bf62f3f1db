select brightrun.take_rate($1, $2)
