select brightrun.cancel_many($1, $2, $3, $4)
