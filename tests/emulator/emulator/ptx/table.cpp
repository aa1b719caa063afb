// table.cpp - the instructions by their names.
#include <unordered_map>

#include "ptx.h"

namespace ptx {
struct Table {
  std::unordered_map<std::string, std::vector<Form>> forms;
  std::unordered_map<std::string, bool (*)(const Parts&, Form&)> families;
};
static Table& table() {
  static Table t;
  return t;
}
void define(const std::string& name, Form form) { table().forms[name].push_back(std::move(form)); }
void define_family(const std::string& first, bool (*parse)(const Parts&, Form&)) { table().families[first] = parse; }
static void define_all() {
  integer_forms();
  float_forms();
  convert_forms();
  memory_forms();
  atomic_forms();
  warp_forms();
  async_forms();
  for (const char* name : {"bra", "bra.uni"}) define(name, {nullptr, ":l", BRANCH});
  for (const char* name : {"ret", "ret.uni", "exit"}) define(name, {nullptr, ":", EXIT});
}
static Parts split(const std::string& name) {
  Parts parts;
  size_t from = 0;
  for (size_t at; (at = name.find('.', from)) != std::string::npos; from = at + 1)
    parts.push_back(name.substr(from, at - from));
  parts.push_back(name.substr(from));
  return parts;
}
std::vector<Form> forms(const std::string& name) {
  static bool defined = (define_all(), true);
  (void)defined;
  auto listed = table().forms.find(name);
  if (listed != table().forms.end()) return listed->second;
  Parts parts = split(name);
  auto family = table().families.find(parts[0]);
  Form form{};
  if (family == table().families.end() || !family->second(parts, form)) return {};
  return table().forms[name] = {form};
}
}  // namespace ptx
