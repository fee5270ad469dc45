#include "text/jinja/evaluator.h"

#include <fmt/format.h>

#include <algorithm>

#include "flash_mla/error.h"
#include "text/jinja/arithmetic.h"

namespace flash_mla::text::jinja {
namespace {

using Kind = Expression::Kind;

constexpr std::int64_t kMaxSteps = 50'000'000;  // a second or two
constexpr int kMaxDepth = 200;  // of expressions and macros within each other: the stack holds them
constexpr std::size_t kBytesPerStep = 64;  // copied

/// How a body ended.
enum class Flow { kOn, kBreak, kContinue };

class Evaluator {
 public:
  Evaluator(const Program& program, const std::vector<std::pair<std::string, Value>>& variables)
      : program_(program) {
    scopes_.emplace_back();
    for (std::size_t i = 0; i < program.names.size(); ++i) {
      if (program.names[i] == "loop") loop_ = static_cast<Symbol>(i);
      for (const auto& [name, value] : variables) {
        if (name == program.names[i]) scopes_[0].emplace_back(static_cast<Symbol>(i), value);
      }
    }
  }

  MarkedText run() {
    try {
      run_body(program_.body);
    } catch (const Problem& problem) {
      throw InvalidArgument(
          problem.raised ? fmt::format("messages: {} (line {} of the chat template)", problem.what, line_)
                         : fmt::format("messages: line {} of the chat template does not take them: {}", line_,
                                       problem.what));
    }
    return std::move(out_);
  }

 private:
  using Scope = std::vector<std::pair<Symbol, Value>>;

  void spend(std::size_t steps) {
    steps_ += static_cast<std::int64_t>(steps);
    if (steps_ > kMaxSteps) throw Problem{fmt::format("rendering takes more than {} steps", kMaxSteps)};
  }

  // ---------------------------------------------------------------------------------- statements

  Flow run_body(const std::vector<std::unique_ptr<Statement>>& body) {
    for (const auto& statement : body) {
      const Flow flow = run_statement(*statement);
      if (flow != Flow::kOn) return flow;
    }
    return Flow::kOn;
  }

  Flow run_statement(const Statement& s) {
    spend(1);
    line_ = s.line;
    switch (s.kind) {
      case Statement::Kind::kText:
        print(s.text);
        return Flow::kOn;
      case Statement::Kind::kPrint:
        print(to_text(evaluate(*s.expression)));
        return Flow::kOn;
      case Statement::Kind::kIf:
        return run_body(evaluate(*s.expression).truth() ? s.body : s.otherwise);
      case Statement::Kind::kFor:
        return run_for(s);
      case Statement::Kind::kSet:
        assign(s.target, evaluate(*s.expression));
        return Flow::kOn;
      case Statement::Kind::kSetBlock:
        assign(s.target, capture([&] { in_scope([&] { run_body(s.body); }); }));
        return Flow::kOn;
      case Statement::Kind::kScope: {
        Flow flow = Flow::kOn;
        in_scope([&] { flow = run_body(s.body); });
        return flow;
      }
      case Statement::Kind::kBody:
        return run_body(s.body);
      case Statement::Kind::kBreak:
        return Flow::kBreak;
      case Statement::Kind::kContinue:
        return Flow::kContinue;
    }
    return Flow::kOn;
  }

  void print(const MarkedText& text) { spend(out_.append(text) / kBytesPerStep); }

  template <class F>
  MarkedText capture(const F& f) {
    MarkedText outer = std::exchange(out_, {});
    f();
    return std::exchange(out_, std::move(outer));
  }

  template <class F>
  void in_scope(const F& f) {
    scopes_.emplace_back();
    f();
    scopes_.pop_back();
  }

  std::shared_ptr<const std::vector<Value>> loop_items(const Statement& s) {
    const Value value = evaluate(*s.expression);
    std::shared_ptr<const std::vector<Value>> all;
    if (value.list() != nullptr) {
      const std::shared_ptr<const List> list = value.shared_list();
      all = {list, &list->items};
    } else {
      all = std::make_shared<const std::vector<Value>>(items_of(value));
      spend(all->size());
    }
    if (s.condition == nullptr) return all;
    auto chosen = std::make_shared<std::vector<Value>>();
    in_scope([&] {
      for (const Value& item : *all) {
        scopes_.back().clear();
        assign(s.target, item);
        if (evaluate(*s.condition).truth()) chosen->push_back(item);
      }
    });
    return chosen;
  }

  Flow run_for(const Statement& s) {
    const auto items = loop_items(s);
    if (items->empty()) return run_body(s.otherwise);
    ++loops_;
    bool completed = false;
    in_scope([&] {
      for (std::size_t i = 0; i < items->size(); ++i) {
        spend(1);
        scopes_.back().clear();
        if (loop_ >= 0) {
          scopes_.back().emplace_back(loop_, std::make_shared<const Loop>(Loop{items, i, loops_}));
        }
        assign(s.target, (*items)[i]);
        const Flow flow = run_body(s.body);
        completed = completed || flow == Flow::kOn;
        if (flow == Flow::kBreak) break;
      }
    });
    --loops_;
    // To Jinja2 an iteration that was cut short is none.
    return completed ? Flow::kOn : run_body(s.otherwise);
  }

  void set(Symbol symbol, Value value) {
    for (auto& [known, place] : scopes_.back()) {
      if (known == symbol) {
        place = std::move(value);
        return;
      }
    }
    scopes_.back().emplace_back(symbol, std::move(value));
  }

  void assign(const Target& target, Value value) {
    if (!target.field.empty()) {
      const Value* holder = find(target.symbols[0]);
      if (holder == nullptr || holder->name_space() == nullptr) {
        throw Problem{
            fmt::format("an assignment to a field of {}, which is no namespace", name_of(target.symbols[0]))};
      }
      holder->name_space()->attributes.set(MarkedText(target.field, true), std::move(value));
    } else if (!target.tuple) {
      set(target.symbols[0], std::move(value));
    } else {
      const std::vector<Value> items = items_of(value);
      if (items.size() != target.symbols.size()) {
        throw Problem{fmt::format("{} values for {} names", items.size(), target.symbols.size())};
      }
      for (std::size_t i = 0; i < items.size(); ++i) set(target.symbols[i], items[i]);
    }
  }

  // --------------------------------------------------------------------------------- expressions

  const std::string& name_of(Symbol symbol) const { return program_.names[static_cast<std::size_t>(symbol)]; }

  const Value* find(Symbol symbol) const {
    for (std::size_t i = scopes_.size(); i-- > base_;) {
      for (const auto& [known, value] : scopes_[i]) {
        if (known == symbol) return &value;
      }
    }
    if (base_ == 0) return nullptr;
    // A macro sees its own scopes and the outermost.
    const auto found = std::ranges::find(scopes_[0], symbol, &Scope::value_type::first);
    return found == scopes_[0].end() ? nullptr : &found->second;
  }

  Value evaluate_name(const Expression& e) const {
    if (const Value* value = find(e.symbol)) return *value;
    if (const auto& macro = program_.macros[static_cast<std::size_t>(e.symbol)]) return macro.get();
    // A function that is looked at ("is defined") and not called.
    if (find_function(e.name) != nullptr) return Method{nullptr, e.name};
    return Undefined{e.name};
  }

  struct Deeper {
    explicit Deeper(int& counter) : depth(counter) {
      if (++depth > kMaxDepth) {
        --depth;
        throw Problem{fmt::format("expressions and macros are more than {} deep", kMaxDepth)};
      }
    }
    ~Deeper() { --depth; }
    int& depth;
  };

  Value evaluate(const Expression& e) {
    const Deeper deeper(depth_);
    spend(1);
    line_ = e.line;
    switch (e.kind) {
      case Kind::kConstant:
        return e.value;
      case Kind::kName:
        return evaluate_name(e);
      case Kind::kField: {
        const Value self = evaluate(*e.operands[0]);
        return field_of(self, e.name);
      }
      case Kind::kItem: {
        const Value self = evaluate(*e.operands[0]), key = evaluate(*e.operands[1]);
        return item_of(self, key);
      }
      case Kind::kAnd:
      case Kind::kOr: {
        Value left = evaluate(*e.operands[0]);
        return left.truth() == (e.kind == Kind::kOr) ? left : evaluate(*e.operands[1]);
      }
      case Kind::kNot:
        return !evaluate(*e.operands[0]).truth();
      case Kind::kIf:
        if (evaluate(*e.operands[1]).truth()) return evaluate(*e.operands[0]);
        return e.operands[2] == nullptr ? Value() : evaluate(*e.operands[2]);
      case Kind::kBinary:
        return evaluate_binary(e);
      case Kind::kCompare:
        return evaluate_comparison(e);
      case Kind::kConcatenate:
        return evaluate_concatenation(e);
      case Kind::kNegate:
      case Kind::kPlus:
        return signed_value(evaluate(*e.operands[0]), e.kind == Kind::kNegate);
      default:
        return evaluate_larger(e);
    }
  }

  /// What makes containers or calls.
  Value evaluate_larger(const Expression& e) {
    switch (e.kind) {
      case Kind::kList:
      case Kind::kTuple: {
        List out;
        out.tuple = e.kind == Kind::kTuple;
        for (const auto& item : e.operands) out.items.push_back(evaluate(*item));
        return out;
      }
      case Kind::kDict: {
        Dict out;
        for (std::size_t i = 0; i < e.operands.size(); i += 2) {
          const Value key = evaluate(*e.operands[i]);
          out.set(key, evaluate(*e.operands[i + 1]));
        }
        return out;
      }
      case Kind::kSlice:
        return evaluate_slice(e);
      case Kind::kCallMacro:
        return call_macro(e);
      case Kind::kCycle:
        return evaluate_cycle(e);
      default:
        return call_builtin(e);
    }
  }

  Value evaluate_binary(const Expression& e) {
    Value left = evaluate(*e.operands[0]);
    const Value right = evaluate(*e.operands[1]);
    line_ = e.line;
    if (e.op == Operator::kAdd && left.text() != nullptr && right.text() != nullptr) {
      MarkedText sum = *left.text();
      left = Value();
      spend(sum.append(*right.text()) / kBytesPerStep);
      return sum;
    }
    if (left.list() != nullptr) spend(left.list()->items.size());
    return arithmetic(e.op, left, right);
  }

  Value evaluate_concatenation(const Expression& e) {
    MarkedText out;
    for (const auto& part : e.operands) spend(out.append(to_text(evaluate(*part))) / kBytesPerStep);
    return out;
  }

  Value evaluate_comparison(const Expression& e) {
    Value left = evaluate(*e.operands[0]);
    for (std::size_t i = 0; i < e.comparisons.size(); ++i) {
      Value right = evaluate(*e.operands[i + 1]);
      if (right.list() != nullptr) spend(right.list()->items.size());
      if (right.text() != nullptr) spend(right.text()->size() / kBytesPerStep);
      if (!compare(e.comparisons[i], left, right)) return false;
      left = std::move(right);
    }
    return true;
  }

  Value evaluate_slice(const Expression& e) {
    const Value self = evaluate(*e.operands[0]);
    Value bounds[3];
    for (std::size_t i = 0; i < 3; ++i) {
      bounds[i] = e.operands[i + 1] == nullptr ? Value(None()) : evaluate(*e.operands[i + 1]);
    }
    line_ = e.line;
    Value out = slice(self, bounds[0], bounds[1], bounds[2]);
    if (out.list() != nullptr) spend(out.list()->items.size());
    if (self.text() != nullptr) spend(self.text()->size() / kBytesPerStep);
    return out;
  }

  Value evaluate_cycle(const Expression& e) {
    const Value loop = evaluate(*e.operands[0]);
    if (loop.loop() == nullptr || e.operands.size() == 1 || !e.named.empty())
      throw Problem{"loop.cycle without items or a loop"};
    return evaluate(*e.operands[1 + loop.loop()->index % (e.operands.size() - 1)]);
  }

  Arguments arguments_of(const Expression& e, std::size_t first) {
    Arguments out;
    for (std::size_t i = first; i < e.operands.size(); ++i)
      out.positional.push_back(evaluate(*e.operands[i]));
    for (const auto& [name, value] : e.named) out.named.emplace_back(name, evaluate(*value));
    return out;
  }

  /// namespace.field.append(item) and namespace.field.pop(place): the namespace gets another list. (Other
  /// holders of the old one do not see the change, as they would in Python.)
  Value change_list(const Expression& e) {
    const Expression& field = *e.operands[0];
    const Value owner = evaluate(*field.operands[0]);
    Namespace* kept_in = owner.name_space();
    const Value* old = kept_in == nullptr ? nullptr : kept_in->attributes.find(field.name);
    if (old == nullptr || old->list() == nullptr || old->list()->tuple) {
      throw Problem{fmt::format("the method \"{}\" of what is no list in a namespace", e.name)};
    }
    Arguments arguments = arguments_of(e, 1);
    line_ = e.line;
    std::vector<Value> items = old->list()->items;
    spend(items.size());
    Value out = None();
    if (e.name == "append") {
      items.push_back(arguments.require("item"));
    } else {
      const auto size = static_cast<std::int64_t>(items.size());
      const Value place = arguments.take("index", std::int64_t{-1});
      if (!place.is_integer()) throw Problem{"pop of a place that is no integer"};
      const std::int64_t at = place.integer() < 0 ? place.integer() + size : place.integer();
      if (at < 0 || at >= size) throw Problem{"pop of what a list does not have"};
      out = items[static_cast<std::size_t>(at)];
      items.erase(items.begin() + at);
    }
    arguments.finish();
    List changed;
    changed.items = std::move(items);
    kept_in->attributes.set(MarkedText(field.name, true), Value(std::move(changed)));
    return out;
  }

  Value call_builtin(const Expression& e) {
    if (e.kind == Kind::kCallMethod && (e.name == "append" || e.name == "pop")) return change_list(e);
    const bool has_self = e.kind != Kind::kCallBuiltin;
    const Value self = has_self ? evaluate(*e.operands[0]) : Value();
    Arguments arguments = arguments_of(e, has_self ? 1 : 0);
    line_ = e.line;
    if (e.builtin == nullptr || !e.builtin->quick) {
      if (self.list() != nullptr) spend(self.list()->items.size());
      if (self.dict() != nullptr && e.name != "get") spend(self.dict()->size());
      if (self.text() != nullptr) spend(self.text()->size() / kBytesPerStep);
    }
    Value out = e.builtin == nullptr ? call_method(self, e.name, arguments) : e.builtin->run(self, arguments);
    arguments.finish();
    return out;
  }

  Value call_macro(const Expression& e) {
    const Macro& macro = *program_.macros[static_cast<std::size_t>(e.symbol)];
    Arguments arguments = arguments_of(e, 0);
    const std::size_t base = std::exchange(base_, scopes_.size());
    const int loops = std::exchange(loops_, 0);
    MarkedText out = capture([&] {
      in_scope([&] {
        for (const auto& [name, fallback] : macro.parameters) {
          std::optional<Value> given = arguments.take(name_of(name));
          if (!given) given = fallback == nullptr ? Value(Undefined{name_of(name)}) : evaluate(*fallback);
          set(name, std::move(*given));
        }
        arguments.finish();
        run_body(macro.body);
      });
    });
    base_ = base;
    loops_ = loops;
    return out;
  }

  const Program& program_;
  std::vector<Scope> scopes_;
  std::size_t base_ = 0;  // of the macro that runs
  Symbol loop_ = -1;
  int loops_ = 0, depth_ = 0, line_ = 1;
  std::int64_t steps_ = 0;
  MarkedText out_;
};

}  // namespace

MarkedText evaluate(const Program& program, const std::vector<std::pair<std::string, Value>>& variables) {
  return Evaluator(program, variables).run();
}

}  // namespace flash_mla::text::jinja
