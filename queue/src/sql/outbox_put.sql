select brightrun.outbox_put($1, $2, $3, make_interval(secs => $4))
