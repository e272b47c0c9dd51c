"""What the service tells its operators: structured logs (`logs`) and Prometheus metrics (`metrics`)."""
