select brightrun.brief_finish($1, $2, $3, make_interval(secs => $4))
