select brightrun.brief_beat($1)
