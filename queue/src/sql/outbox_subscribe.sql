select brightrun.outbox_subscribe($1, make_interval(secs => $2))
