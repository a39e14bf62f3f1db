select spent, reserved from brightrun.dispatch_spend($1)
