select brightrun.explain($1)
