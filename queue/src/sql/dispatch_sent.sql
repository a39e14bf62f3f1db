select brightrun.dispatch_sent($1, $2, $3, make_interval(secs => $4))
