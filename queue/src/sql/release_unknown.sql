select brightrun.release_unknown($1, $2)
