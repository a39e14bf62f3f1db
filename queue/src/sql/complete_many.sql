select job_id, token, state, refused from brightrun.complete_many($1, $2, $3)
