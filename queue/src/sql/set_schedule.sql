select brightrun.set_schedule(
    $1, $2, $3, p_cron => $4, p_every => make_interval(secs => $5), p_time_zone => $6, p_queue => $7, p_priority => $8, p_owner => $9,
    p_max_attempts => $10)
