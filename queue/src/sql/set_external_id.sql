select brightrun.set_external_id($1, $2)
