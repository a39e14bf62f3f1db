select brightrun.dispatch_again($1, $2, make_interval(secs => $3))
