"""Plain models over HTTP: requests and answers of the Open Inference Protocol (KServe v2), JSON and binary."""
