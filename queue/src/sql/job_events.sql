select seq, at, event, attempt, token, worker, coalesce(level, 'info') as level, detail from brightrun.job_events($1, $2, $3)
