-- Returns the arguments from ARGV[first] on, as tables whose fields have these names.
local function records(first, ...)
  local names, tables = {...}, {}
  for at = first, #ARGV, #names do
    local record = {}
    for offset, name in ipairs(names) do record[name] = ARGV[at + offset - 1] end
    tables[#tables + 1] = record
  end
  return tables
end
