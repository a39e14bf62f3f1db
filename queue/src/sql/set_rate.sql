select brightrun.set_rate($1, $2, $3, make_interval(secs => $4))
