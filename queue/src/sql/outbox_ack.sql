select brightrun.outbox_ack($1, $2)
