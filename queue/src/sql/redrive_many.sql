select brightrun.redrive_many($1, $2, $3)
