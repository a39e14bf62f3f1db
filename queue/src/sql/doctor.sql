select item, ok, message, hint from brightrun.doctor()
