select job_id, state from brightrun.rescue_expired($1, make_interval(secs => $2))
