-- What wrk sends: one question, to be answered with one word.
wrk.method = "POST"
wrk.body = '{"model": "forgearr/tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}'
wrk.headers["Content-Type"] = "application/json"
