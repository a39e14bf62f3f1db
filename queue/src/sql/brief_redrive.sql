select brightrun.brief_redrive($1, $2)
