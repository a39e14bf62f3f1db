select brightrun.dispatch_over($1, $2)
