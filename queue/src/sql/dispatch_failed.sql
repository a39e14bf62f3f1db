select brightrun.dispatch_failed($1, $2, $3)
