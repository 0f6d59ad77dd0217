-- The arguments from ARGV[first] on, in tables with these names as fields.
local function records(first, ...)
  local names, found = {...}, {}
  for at = first, #ARGV, #names do
    local record = {}
    for offset, name in ipairs(names) do record[name] = ARGV[at + offset - 1] end
    found[#found + 1] = record
  end
  return found
end
