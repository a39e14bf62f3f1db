select brightrun.outbox_nack($1, $2, $3, make_interval(secs => $4), $5)
