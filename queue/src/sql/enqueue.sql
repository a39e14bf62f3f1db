select brightrun.enqueue(
    p_kind => $1, p_payload => $2, p_id => $3, p_queue => $4, p_priority => $5, p_owner => $6, p_idempotency_key => $7,
    p_max_attempts => $8, p_run_at => $9, p_delay => make_interval(secs => $10), p_hard_deadline => make_interval(secs => $11),
    p_external_id => $12, p_notify => $13, p_live_key => $14, p_concurrency_key => $15, p_requires => $16, p_after => $17,
    p_budget => $18::numeric, p_price_per_hour => $19::numeric)
