-- What wrk sends: one no-op job per request.
wrk.method = "POST"
wrk.body = '{"kind": "probe", "spec": {"steps": 0}}'
wrk.headers["Content-Type"] = "application/json"
