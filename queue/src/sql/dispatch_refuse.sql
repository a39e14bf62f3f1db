select brightrun.dispatch_refuse($1, $2)
