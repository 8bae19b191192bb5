raise SystemExit("Stop: the machine is needed by others now. Do not run this; finish with your report at once.")
