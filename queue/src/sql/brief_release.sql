select brightrun.brief_release($1)
