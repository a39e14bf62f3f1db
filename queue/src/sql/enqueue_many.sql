select brightrun.enqueue_many(
    p_kind => $1, p_payloads => $2, p_queue => $3, p_priority => $4, p_owner => $5, p_max_attempts => $6, p_run_at => $7,
    p_delay => make_interval(secs => $8), p_hard_deadline => make_interval(secs => $9), p_notify => $10)
