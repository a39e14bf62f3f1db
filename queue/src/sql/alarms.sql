select alarm, message, hint from brightrun.alarms()
