select seq, at, event, attempt, token, worker, detail from brightrun.job_events($1, $2, $3)
