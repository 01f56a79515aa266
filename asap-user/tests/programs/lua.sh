# needs: /usr/bin/lua5.4 (lua5.4)
cat > script.lua <<'END'
local function fib(n) if n < 2 then return n end return fib(n - 1) + fib(n - 2) end
print(fib(24))
local t = {}
for i = 1, 50000 do t[i] = (i * 7919) % 10007 end
table.sort(t, function(a, b) return a > b end)
print(t[1], t[#t])
local co = coroutine.wrap(function() for i = 1, 1000 do coroutine.yield(i) end return "done" end)
local last for _ = 1, 1001 do last = co() end
print(last)
print(pcall(error, {code = 2}), select('#', pcall(error)))
print(pcall(string.rep)) 
local s = 0 for w in string.gmatch(("word "):rep(5000), "%a+") do s = s + #w end print(s)
print(string.format("%5.3f %q", math.pi, "a\nb"))
local mt = setmetatable({}, {__index = function(_, k) return k * 2 end}) print(mt[21])
collectgarbage() os.exit(4)
END
$RUN lua5.4 script.lua || echo "ended with $?"
