select brightrun.brief_push($1, $2, make_interval(secs => $3), $4)
